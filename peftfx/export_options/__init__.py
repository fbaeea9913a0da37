"""What may be asked of an export, each kind as one object that is checked whole when it is made."""
