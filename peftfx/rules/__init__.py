"""Rules: methods with options and targets, from text, objects or HF PEFT's configs, and the sites that they pick."""
