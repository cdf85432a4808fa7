"""Who is it: SASL exchanges, password hashes, the directory of logins."""
