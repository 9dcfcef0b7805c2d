package doctor

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"

	"blockferry/cmd/blockferry/certs"
	"blockferry/cmd/blockferry/config"
	"blockferry/cmd/blockferry/exit"
)

// expirySoon is how long before its end a certificate is worth a word.
const expirySoon = 30 * 24 * time.Hour

// Node looks at what this node shows to others. Without certificates it says
// what that means.
func Node(c *config.Config, now time.Time) Findings {
	var f Findings
	n := c.Node
	switch {
	case n == nil:
		return nil
	case n.Certs == "" && n.Plaintext:
		f.note("node", "'insecure: plaintext': nothing is encrypted, and whoever reaches a node may write to its replicas",
			"make certificates: blockferry certs init, then name their folder with 'certs'")
		return f
	case n.Certs == "":
		f.good("node", "'%s', other nodes on this machine only", n.Name)
		return f
	}
	const again = "make or renew it where the authority is (blockferry certs issue, blockferry certs renew) and put the folder there; the agent takes it without a restart"
	node, err := certs.ReadNode(n.Certs)
	if err != nil {
		f.refuse(exit.Prerequisite, n.Certs, "this node's certificate can't be read: "+err.Error(), again)
		return f
	}
	if info, err := os.Stat(node.Path); err == nil && info.Mode().Perm()&0o077 != 0 {
		f.refuse(exit.Refused, node.Path, fmt.Sprintf("it holds this node's key and can be read by others (mode %o)", info.Mode().Perm()), "run: chmod 600 "+node.Path)
	}
	if _, err := os.Stat(n.Certs + "/" + certs.CAKeyFile); !errors.Is(err, fs.ErrNotExist) {
		f.note(n.Certs, "it holds the authority's key ("+certs.CAKeyFile+"): who has this node can issue certificates for any", "keep that key on another machine")
	}
	if err := node.Check(n.Name, now); err != nil {
		f.refuse(exit.Prerequisite, n.Certs, err.Error(), again)
		return f
	}
	for _, info := range append([]certs.Info{node.Info}, node.TrustedInfo()...) {
		if info.NotAfter.Sub(now) < expirySoon {
			f.note(info.Path, info.String()+", "+info.Expiry(now), again)
		} else {
			f.good(info.Path, "%v, %s", info, info.Expiry(now))
		}
	}
	return f
}
