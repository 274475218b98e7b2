"""What people look at: the page, pictures, and the chat."""
