"""The options of exports: one class for each kind of export, checked as a whole when an object is made."""
