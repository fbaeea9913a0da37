"""Rules: methods and where they apply, from text, objects or HF PEFT's configs, resolved against a model's sites."""
