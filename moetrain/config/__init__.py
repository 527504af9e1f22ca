"""The run as one validated tree, and all that follows from it by arithmetic. Loads without torch."""
