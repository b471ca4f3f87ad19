"""Who is who: the certificate authority, tokens, and the rules by which a peer is admitted."""
