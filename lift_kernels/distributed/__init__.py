"""What several ranks must agree on. This package imports torch alone and knows no optimizer."""
