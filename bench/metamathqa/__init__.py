"""LIFT in PEFT's public comparison of methods on MetaMathQA and GSM8K."""
