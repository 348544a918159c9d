"""wave64 inside other libraries: `hugging_face.register()`."""
