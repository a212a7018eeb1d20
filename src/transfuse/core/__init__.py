"""What two or more methods share, and nothing else. Import the submodule you need."""
