package integration

import "testing"

// The manual's walk from two empty machines to a highly available NFS server: its commands, in
// guests. A client with a hard mount, and a lock, goes on without a new mount when the volume is
// moved, with nothing lost, and when the primary's machine loses its power, with all that status
// had claimed, and nothing torn.
func TestNFS(t *testing.T) {
	needs(t, "rpc.nfsd", "mount.nfs4", "arping", "etcd")
	inGuests(t, pairMembers(t, "nfsd", "nfsv4"), pairTasks(), func(t *testing.T, g *guests) {
		p := newHAPair(g, "../docs/nfs.md", "/dev/nvme1n1", ubd(0))
		defer p.explain("'blockferry*'", "srv-data.mount", "nfsdcld", "nfs-server", "nfs-mountd", "data-address", "etcd")
		p.walk("Switch over")
		p.writes("/mnt/files/records", true)
		p.moved("Pull the plug", "/srv/data/share/records")
		p.cut("/srv/data/share/records")
		p.walk("")
	})
}
