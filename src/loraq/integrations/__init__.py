"""Other libraries' models and folders; each is imported only here, and only when it is needed."""
