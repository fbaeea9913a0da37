"""What a forward hands on to its text model, with sounds and without."""
