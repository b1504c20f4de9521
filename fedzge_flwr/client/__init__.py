"""A client's side of the wire: endpoints, what they do, what is kept, what the owner allows."""
