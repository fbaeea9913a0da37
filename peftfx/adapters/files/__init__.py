"""Reading and writing of HF PEFT's adapter directories."""
