package config

import (
	"errors"
	"fmt"
	"net/url"
	"path/filepath"
	"strings"
	"time"

	"github.com/goccy/go-yaml/ast"
)

// Lease says where nodes agree on who may write a volume with AutoPromote.
type Lease struct {
	// Endpoints are etcd's: http://HOST:PORT or https://HOST:PORT, all of one kind.
	Endpoints []string
	// CA is a file of authorities for https, "": the system's. Cert and Key say who this
	// node is; "": nobody.
	CA, Cert, Key string
	// Prefix begins the name of every key.
	Prefix string
	// TTL is how long a lease lives after it was renewed last, in whole seconds.
	TTL time.Duration
}

// Ranges of leases.
const (
	MinLeaseTTL     = 5 * time.Second
	MaxLeaseTTL     = 10 * time.Minute
	DefaultLeaseTTL = 10 * time.Second
	DefaultPrefix   = "/blockferry"
	maxEndpoints    = 16
	maxPrefix       = 128

	MinMaxLoss     = 200 * time.Millisecond
	MaxMaxLoss     = 24 * time.Hour
	DefaultMaxLoss = 10 * time.Second
)

// Margin is how long before etcd may give the lease to another the holder stops: for
// clocks that run at different rates, for the time it takes to stop, and for a
// leader of etcd's that does not know yet that it is none any more.
func (l *Lease) Margin() time.Duration { return max(l.TTL/5, time.Second) }

// Renew is how often the holder renews.
func (l *Lease) Renew() time.Duration { return l.TTL / 3 }

// lease checks what is said of etcd, and of volumes that need it.
func (r *reader) lease(key, value ast.Node) {
	if key == nil {
		for _, a := range r.auto {
			r.fail(a.at, "volume '%s' has 'promote: auto', and the file no 'lease:', which says where nodes agree on who writes it", a.volume.Name)
		}
		return
	}
	l := &Lease{Prefix: DefaultPrefix, TTL: DefaultLeaseTTL}
	r.config.Lease = l
	plaintext := false
	var endpointsAt ast.Node
	present := r.fields(value, "'lease'", []field{
		{"endpoints", func(n ast.Node) { endpointsAt = n; r.endpoints(n, l) }},
		r.wholePath("ca", &l.CA), r.wholePath("cert", &l.Cert), r.wholePath("key", &l.Key),
		r.text("prefix", func(s string) error {
			l.Prefix = s
			if !strings.HasPrefix(s, "/") || strings.HasSuffix(s, "/") || len(s) > maxPrefix {
				return fmt.Errorf("'%s' is not like /blockferry: a slash first, none last, at most %d bytes", s, maxPrefix)
			}
			return nil
		}),
		r.text("ttl", func(s string) error {
			d, err := parseDuration(s)
			switch {
			case err != nil:
				return err
			case d < MinLeaseTTL || d > MaxLeaseTTL:
				return fmt.Errorf("%s is not between %s and %s", s, shortDuration(MinLeaseTTL), shortDuration(MaxLeaseTTL))
			case d%time.Second != 0:
				return fmt.Errorf("%s is not a number of whole seconds, which etcd counts", s)
			}
			l.TTL = d
			return nil
		}),
		r.choice("insecure", func(string) { plaintext = true }, "plaintext"),
	})
	if present["endpoints"] == nil {
		r.fail(key, "'lease' needs 'endpoints:', where etcd answers")
	}
	if (l.Cert == "") != (l.Key == "") {
		r.fail(key, "'lease' has one of 'cert' and 'key', and needs both")
	}
	for _, e := range l.Endpoints {
		u, err := url.Parse(e)
		if err != nil {
			continue // said already
		}
		if u.Scheme == "http" && !plaintext && !OnThisMachine(u.Host) {
			r.fail(endpointsAt, "endpoints: %s is reached over a network, where nothing would be encrypted and anybody could take a lease; use https, or say 'insecure: plaintext' under 'lease'", e)
			break
		}
	}
	for _, a := range r.auto {
		// A cut is not begun that could span the end of a lease.
		if left := l.TTL - l.Margin() - l.Renew(); a.volume.StallLimit >= left {
			r.fail(a.at, "volume '%s' has a 'stall-limit' of %s; with a 'ttl' of %s under 'lease' it has to be below %s", a.volume.Name,
				shortDuration(a.volume.StallLimit), shortDuration(l.TTL), left.Round(100*time.Millisecond))
		}
	}
}

// autoVolume is a volume with 'promote: auto', and where that stands.
type autoVolume struct {
	at     ast.Node
	volume *Volume
}

// promote checks what is said of automatic promotion.
func (r *reader) promote(v *Volume, present map[string]ast.Node) {
	what := "volume '" + v.Name + "'"
	if at := present["max-loss"]; at != nil && !v.AutoPromote {
		r.fail(at, "%s has 'max-loss', which is for 'promote: auto'", what)
	}
	if !v.AutoPromote {
		return
	}
	at := present["promote"]
	if !v.Switches() {
		r.fail(at, "%s has 'promote: auto', which is for volumes with both 'peers' and 'replicas': they can be primary and secondary here", what)
		return
	}
	if v.MaxLoss < 2*v.Interval {
		r.fail(at, "%s has a 'max-loss' of %s, less than twice its 'interval' of %s: no replica would ever be close enough to be promoted", what, shortDuration(v.MaxLoss), shortDuration(v.Interval))
	}
	r.auto = append(r.auto, autoVolume{at, v})
}

// endpoints reads a list of URLs.
func (r *reader) endpoints(n ast.Node, l *Lease) {
	const what = "'endpoints'"
	list, ok := n.(*ast.SequenceNode)
	if !ok || len(list.Values) == 0 || len(list.Values) > maxEndpoints {
		r.fail(n, "%s must be a list of 1 to %d, as in [https://10.0.1.5:2379, https://10.0.2.5:2379]", what, maxEndpoints)
		return
	}
	for _, one := range list.Values {
		s, ok := scalar(one)
		u, err := url.Parse(s)
		switch {
		case !ok || err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Port() == "" || u.Hostname() == "" || s != u.Scheme+"://"+u.Host:
			r.fail(one, "%s: '%s' is not like https://10.0.1.5:2379", what, s)
			continue
		case len(l.Endpoints) > 0 && !strings.HasPrefix(l.Endpoints[0], u.Scheme+":"):
			r.fail(one, "%s has both http and https", what)
		}
		l.Endpoints = append(l.Endpoints, s)
	}
}

// wholePath reads one.
func (r *reader) wholePath(key string, into *string) field {
	return r.text(key, func(s string) error {
		if !filepath.IsAbs(s) {
			return errors.New("'" + s + "' is not a whole path")
		}
		*into = filepath.Clean(s)
		return nil
	})
}
