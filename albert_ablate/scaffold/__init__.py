"""What someone with components of their own begins with: `init`, `new` and `check-component`."""
