"""Counterfactual items made from articles with questions and answers."""
