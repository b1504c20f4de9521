"""Files of someone who means harm: two hundred and more, and a process that opens them all."""
