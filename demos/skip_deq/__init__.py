"""A study of Skip DEQ: digits, where the guess is enough, and memory, where the answer takes many iterations."""
