"""Floor 2: which dtype each quantity has, and how losses are scaled."""
