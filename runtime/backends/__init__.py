"""What runs graphs: the protocol of backends, those there are, and which of them opens a bundle."""
