"""Is a server what the run asks for?"""
