"""Adapters: parameter-efficient tuners that `peft.get_peft_model` accepts."""
