PREFIX = "tfds:"
