"""Updates made small for the way up: which values travel, in how many bits, and what stays for later.

`chain` says what a codec is, `layout` what of a model it works on, `stages` what it does to values,
`positions` how positions are written; `update` puts these together into bytes and reads them again. Plain
numpy and zlib.
"""
