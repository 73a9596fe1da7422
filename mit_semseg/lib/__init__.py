"""Parts that anyone could use without the rest of the toolkit."""
