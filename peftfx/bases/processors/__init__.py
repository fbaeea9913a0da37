"""What a model's processor makes: the size of its images, the shape of its recordings, and the types of its tokens."""
