"""The methods, a file for those that share what leaves a client."""
