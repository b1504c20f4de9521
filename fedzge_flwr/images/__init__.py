"""What an image is: its pixels, its shape and classes, labelled sets of it."""
