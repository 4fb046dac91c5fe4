"""From files to tokenised completion groups."""
