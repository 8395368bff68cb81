"""What data hold, as a person wants to see it: rows with what is trained marked, lengths, likeness, faults."""
