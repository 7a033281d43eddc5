"""Files and URLs of others → records with image bytes."""
