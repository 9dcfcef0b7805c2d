package transport

import (
	"fmt"
	"net"
	"sync"
)

// limits count connections: those that have not shown who they are, by host,
// then those of each node.
type limits struct {
	refused func(who, why string)
	each    int // connections that a node may have

	mu      sync.Mutex
	pending int
	hosts   map[string]int
	nodes   map[string]int
}

// enter admits a new connection, or says why not.
func (l *limits) enter(host string) string {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case l.hosts[host] >= maxPendingHost:
		return fmt.Sprintf("%d connections of it have not shown a certificate yet", maxPendingHost)
	case l.pending >= maxPending:
		return fmt.Sprintf("%d connections have not shown a certificate yet", maxPending)
	}
	if l.hosts == nil {
		l.hosts, l.nodes = map[string]int{}, map[string]int{}
	}
	l.pending++
	l.hosts[host]++
	return ""
}

// promote counts a connection among those of a node; many says that these are more
// than it needs, which its call is told. Twice as many are closed at once.
func (l *limits) promote(raw net.Conn, node string) (many bool, err error) {
	c, ok := raw.(*limitedConn)
	if !ok {
		return false, nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if node == "" { // plaintext
		node = "host " + c.host
	}
	n := l.nodes[node]
	if n >= 2*l.each {
		return true, fmt.Errorf("it has %d connections already", n)
	}
	c.node = node
	l.nodes[node]++
	l.release(c)
	return n >= l.each, nil
}

// release forgets that a connection is pending; mu is held.
func (l *limits) release(c *limitedConn) {
	if c.pending {
		c.pending = false
		l.pending--
		decrease(l.hosts, c.host)
	}
}

func decrease(m map[string]int, key string) {
	if m[key]--; m[key] <= 0 {
		delete(m, key)
	}
}

type limitedListener struct {
	net.Listener
	limits *limits
}

// Accept passes over connections that are too many.
func (l *limitedListener) Accept() (net.Conn, error) {
	for {
		conn, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		host := hostOf(conn.RemoteAddr())
		why := l.limits.enter(host)
		if why == "" {
			return &limitedConn{Conn: conn, limits: l.limits, host: host, pending: true}, nil
		}
		l.limits.refused(host, why)
		conn.Close()
	}
}

// limitedConn is one that counts.
type limitedConn struct {
	net.Conn
	limits *limits
	host   string
	once   sync.Once

	// Guarded by limits.mu.
	pending bool
	node    string // "": not counted there
}

func (c *limitedConn) Close() error {
	c.once.Do(func() {
		c.limits.mu.Lock()
		defer c.limits.mu.Unlock()
		c.limits.release(c)
		if c.node != "" {
			decrease(c.limits.nodes, c.node)
		}
	})
	return c.Conn.Close()
}
