"""How the ranks of a group come to be: as processes of this host, by torchrun on several, by Ray on a cluster."""
