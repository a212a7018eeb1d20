"""Editors: one changed or new fact moved from a record into a pretrained model, reversibly."""
