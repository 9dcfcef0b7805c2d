package config

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/goccy/go-yaml/ast"

	"blockferry/cmd/blockferry/certs"
)

// Node is this machine among others.
type Node struct {
	// Name is what others know it by: the name in its certificate.
	Name string
	// Certs is the folder with its certificate; "": none, and what it says is
	// not encrypted.
	Certs string
	// Listen is where it takes replicas from others: HOST:PORT, or unix:PATH.
	Listen string
	// Plaintext allows that over a network without certificates.
	Plaintext bool
	// Hooks of all volumes; nil: none.
	Hooks *Hooks
}

// secondaryKeys are for volumes that may be a replica here, secondaryAll all that
// one knows that is nothing else.
var (
	secondaryKeys = []string{"peers", "journal", "spill", "spill-limit"}
	secondaryAll  = append([]string{"role", "device"}, secondaryKeys...)
)

// afar is a word of the file that is about another node.
type afar struct {
	at   ast.Node
	what string // what has it
	node string // the node named; "": none
	// address of it; "": the word is no address
	address string
}

// node checks what is said of this node, and of others.
func (r *reader) node(key, value ast.Node) {
	if key == nil {
		for _, a := range r.afar {
			r.fail(a.at, "%s is about another node, and this one has no name: the file needs 'node:'", a.what)
			return
		}
		return
	}
	n := &Node{}
	r.config.Node = n
	var nameAt, listenAt ast.Node
	present := r.fields(value, "'node'", []field{
		r.hooks(&n.Hooks, "'node'"),
		keepNode(r.text("name", func(s string) error { n.Name = s; return certs.CheckNodeName(s) }), &nameAt),
		r.text("certs", func(s string) error {
			if !filepath.IsAbs(s) {
				return fmt.Errorf("'%s' is not a whole path", s)
			}
			n.Certs = filepath.Clean(s)
			return nil
		}),
		keepNode(r.address("listen", &n.Listen), &listenAt),
		r.text("rescue", func(s string) error {
			if !filepath.IsAbs(s) {
				return fmt.Errorf("'%s' is not a whole path", s)
			}
			r.config.RescueDir = filepath.Clean(s)
			return nil
		}),
		r.choice("insecure", func(string) { n.Plaintext = true }, "plaintext"),
	})
	if present["name"] == nil {
		r.fail(key, "'node' needs 'name:', what others know this node by")
	}
	if n.Plaintext && n.Certs != "" {
		r.fail(present["insecure"], "'node' has both 'certs' and 'insecure: plaintext'; keep one")
	}
	secure := n.Certs != "" || n.Plaintext
	const todo = "name a folder of certificates with 'certs' under 'node' (blockferry certs), or say 'insecure: plaintext' there"
	if n.Listen != "" && !secure && !OnThisMachine(n.Listen) {
		r.fail(listenAt, "listen: %s can be reached over a network, where nothing would be encrypted and anybody could write; %s", n.Listen, todo)
	}
	for _, a := range r.afar {
		switch {
		case a.node == n.Name && n.Name != "":
			r.fail(a.at, "%s names '%s', which is this node", a.what, a.node)
		case a.address != "" && !secure && !OnThisMachine(a.address):
			r.fail(a.at, "%s is reached over a network, at %s, where nothing would be encrypted; %s", a.what, a.address, todo)
		case a.address == "" && n.Listen == "":
			r.fail(key, "'node' needs 'listen:', where %s is fed from", a.what)
			return
		}
	}
}

// keepNode notes where a value stands.
func keepNode(f field, at *ast.Node) field {
	set := f.set
	return field{f.key, func(n ast.Node) { *at = n; set(n) }}
}

// copyOf checks what is said of the replica that a volume may be here.
func (r *reader) copyOf(pair *ast.MappingValueNode, v *Volume, of *Replica, present map[string]ast.Node) {
	what := "volume '" + v.Name + "'"
	v.Copy = of
	of.Name, of.Device = v.Name, v.Device
	if present["peers"] == nil {
		r.fail(pair.Key, "%s has 'role: secondary' and needs 'peers:', the nodes that may write to it", what)
	}
	r.spill(of, what, present)
	if at := present["peers"]; at != nil && len(v.Peers) > 0 {
		for _, name := range v.Peers {
			r.afar = append(r.afar, afar{at: at, what: "'peers' of " + what, node: name})
		}
	}
}

// switches checks what is said of the other role of a volume that has both. What
// else it has is checked as a primary's.
func (r *reader) switches(pair *ast.MappingValueNode, v *Volume, of *Replica, present map[string]ast.Node) {
	r.copyOf(pair, v, of, present)
	what := "volume '" + v.Name + "'"
	if v.Attach {
		r.fail(present["mode"], "%s has 'peers' and 'mode: attach': a device that is attached has no room for a replica's journal; use 'mode: mapper', or leave 'peers' out", what)
	}
	for _, key := range []string{"cow-device", "metadata-device"} {
		if present[key] != nil {
			r.fail(present[key], "%s has 'peers': '%s' can't be had with both roles", what, key)
		}
	}
}

// secondary checks a volume that is never more than a replica here.
func (r *reader) secondary(pair *ast.MappingValueNode, v *Volume, of *Replica, present map[string]ast.Node) {
	what := "volume '" + v.Name + "'"
	if present["device"] == nil {
		r.fail(pair.Key, "%s needs 'device:', the disk that holds it", what)
	}
	r.copyOf(pair, v, of, present)
	for key, at := range present {
		known := false
		for _, k := range secondaryAll {
			known = known || k == key
		}
		if !known {
			r.fail(at, "%s has 'role: secondary' and no 'replicas'; '%s' is for volumes that can be primary", what, key)
		}
	}
}

// peers reads a list of nodes.
func (r *reader) peers(n ast.Node, v *Volume) {
	what := "'peers' of volume '" + v.Name + "'"
	list, ok := n.(*ast.SequenceNode)
	if !ok {
		r.fail(n, "%s must be a list, as in [node-a, node-b]", what)
		return
	}
	seen := map[string]bool{}
	for _, one := range list.Values {
		name, ok := scalar(one)
		switch {
		case !ok:
			r.fail(one, "%s: a plain word was expected", what)
			continue
		case seen[name]:
			r.fail(one, "%s: '%s' stands twice", what, name)
		}
		seen[name] = true
		if err := certs.CheckNodeName(name); err != nil {
			r.fail(one, "%s: %s", what, err)
		}
		v.Peers = append(v.Peers, name)
	}
	if len(list.Values) == 0 {
		r.fail(n, "%s names nobody: nobody could write to it", what)
	}
}

// remote checks a replica at another node.
func (r *reader) remote(p *Replica, what string, present map[string]ast.Node) {
	for _, key := range []string{"device", "journal", "spill", "spill-limit"} {
		if present[key] != nil {
			r.fail(present[key], "%s is at another node ('address'); '%s' is said there", what, key)
		}
	}
	if present["peer"] == nil {
		r.fail(present["address"], "%s needs 'peer:', the name of the node at that address", what)
	}
	r.afar = append(r.afar, afar{at: present["address"], what: what, node: p.Peer, address: p.Address})
}

func (r *reader) peer(key string, into *string) field {
	return r.text(key, func(s string) error {
		*into = s
		return certs.CheckNodeName(s)
	})
}

// address reads HOST:PORT or unix:PATH.
func (r *reader) address(key string, into *string) field {
	return r.text(key, func(s string) error {
		*into = s
		if path, ok := strings.CutPrefix(s, unixPrefix); ok {
			if !filepath.IsAbs(path) || len(path) > 100 {
				return fmt.Errorf("'%s' is not a socket's whole path of at most 100 bytes, as in unix:/run/blockferry/peers.sock", s)
			}
			return nil
		}
		_, port, err := net.SplitHostPort(s)
		if err != nil {
			return fmt.Errorf("'%s' is not HOST:PORT, such as 10.0.0.2:7070 or [fd00::2]:7070, or unix:PATH", s)
		}
		if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
			return errors.New("'" + port + "' is not a port from 1 to 65535")
		}
		return nil
	})
}

const unixPrefix = "unix:"

// OnThisMachine reports whether nobody outside this machine can reach an
// address: it is a Unix socket's, or loopback's.
func OnThisMachine(address string) bool {
	if strings.HasPrefix(address, unixPrefix) {
		return true
	}
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return false
	}
	ip, err := netip.ParseAddr(host)
	return err == nil && ip.IsLoopback() || host == "localhost"
}
