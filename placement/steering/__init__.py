"""Parts of the controller: what it hears and says, what it knows, plans and tries; values only."""
