"""One round: the server's loop, the client's side, and what passes between them."""
