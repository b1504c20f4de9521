"""What an endpoint tells of the images that its model was trained on."""
