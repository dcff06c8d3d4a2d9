"""Several ranks: what they must agree on. Imports torch alone and knows no optimizer."""
