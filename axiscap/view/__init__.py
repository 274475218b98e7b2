"""Pages, pictures, tables and the chat."""
