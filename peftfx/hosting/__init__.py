"""Hosting: methods inside the base's own modules, for training and eager inference: the modules road."""
