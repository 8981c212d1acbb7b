"""What is to be edited, opened: admitted or refused, laid out where it does not fit, its layers and settings."""
