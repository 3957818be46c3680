"""Linear probes of position: what they are asked, how they are fitted and scored, and their controls."""
