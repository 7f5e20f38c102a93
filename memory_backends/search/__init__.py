"""Finding the rows nearest to queries: the contract of a searcher, and exact search."""
