"""What a model's processor files say of the inputs that the processor makes."""
