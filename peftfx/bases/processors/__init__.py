"""What a model's processor makes: the size of its images, and the types of its tokens."""
