"""Drawn scenes whose truth is known, and how true a bundle is on those that training never drew."""
