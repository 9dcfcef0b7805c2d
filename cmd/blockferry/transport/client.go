package transport

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"

	"blockferry/cmd/blockferry/certs"
	"blockferry/proto"
	"blockferry/protocol"
)

// MaxMessageBytes is the largest message that either side takes, in bytes: one
// of frames with room to spare.
const MaxMessageBytes = 2 << 20

// Client reaches one peer's replication service. Each call has a connection of
// its own, which ends with it: whoever calls again decides when, and knows why
// the last try failed. It may be used by several goroutines.
type Client struct {
	identity  *Identity
	peer      string
	address   string
	handshake string // of this call: why it failed
	fault     Fault  // likewise
}

// Client reaches a peer by its name at an address, HOST:PORT or unix:PATH.
func (i *Identity) Client(peer, address string) *Client {
	return &Client{identity: i, peer: peer, address: address}
}

// call is a connection for one call, which ends with ctx.
func (c *Client) call(ctx context.Context) (*call, error) {
	one := &call{Client: Client{identity: c.identity, peer: c.peer, address: c.address}}
	var security credentials.TransportCredentials = clientCredentials{one}
	if c.identity.Plaintext() {
		security = insecure.NewCredentials()
	}
	options := append(protocol.DialOptions(),
		grpc.WithTransportCredentials(security), grpc.WithDisableServiceConfig(), grpc.WithDisableRetry(), grpc.WithAuthority(c.peer),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(MaxMessageBytes)),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return dial(ctx, c.address) }))
	conn, err := grpc.NewClient("passthrough:///"+c.peer, options...)
	if err != nil {
		return nil, err
	}
	one.conn = conn
	context.AfterFunc(ctx, one.close)
	return one, nil
}

// call is one call and its connection.
type call struct {
	Client
	conn *grpc.ClientConn
	once sync.Once
	mu   sync.Mutex
}

func (c *call) close() { c.once.Do(func() { _ = c.conn.Close() }) }

// ended closes the connection and says in words why.
func (c *call) ended(err error) error {
	if err == nil {
		return nil
	}
	c.close()
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.inWords(err)
}

// outgoing tells the name that a certificate would.
func (c *Client) outgoing(ctx context.Context) context.Context {
	if c.identity.Plaintext() {
		ctx = metadata.AppendToOutgoingContext(ctx, nodeHeader, c.identity.name)
	}
	return ctx
}

// Replicate implements proto.ReplicationClient.
func (c *Client) Replicate(ctx context.Context, o ...grpc.CallOption) (grpc.BidiStreamingClient[proto.FromPrimary, proto.FromReplica], error) {
	one, err := c.call(ctx)
	if err != nil {
		return nil, err
	}
	stream, err := proto.NewReplicationClient(one.conn).Replicate(c.outgoing(ctx), o...)
	if err != nil {
		return nil, one.ended(err)
	}
	return &replicateStream{stream, one}, nil
}

// Restore implements proto.ReplicationClient.
func (c *Client) Restore(ctx context.Context, in *proto.RestoreRequest, o ...grpc.CallOption) (grpc.ServerStreamingClient[proto.RestoreChunk], error) {
	one, err := c.call(ctx)
	if err != nil {
		return nil, err
	}
	stream, err := proto.NewReplicationClient(one.conn).Restore(c.outgoing(ctx), in, o...)
	if err != nil {
		return nil, one.ended(err)
	}
	return &restoreStream{stream, one}, nil
}

// Watch implements proto.ReplicationClient.
func (c *Client) Watch(ctx context.Context, in *proto.WatchRequest, o ...grpc.CallOption) (grpc.ServerStreamingClient[proto.Standing], error) {
	one, err := c.call(ctx)
	if err != nil {
		return nil, err
	}
	stream, err := proto.NewReplicationClient(one.conn).Watch(c.outgoing(ctx), in, o...)
	if err != nil {
		return nil, one.ended(err)
	}
	return &watchStream{stream, one}, nil
}

type watchStream struct {
	grpc.ServerStreamingClient[proto.Standing]
	call *call
}

func (s *watchStream) Recv() (*proto.Standing, error) {
	m, err := s.ServerStreamingClient.Recv()
	return m, s.call.ended(err)
}

type replicateStream struct {
	grpc.BidiStreamingClient[proto.FromPrimary, proto.FromReplica]
	call *call
}

func (s *replicateStream) Recv() (*proto.FromReplica, error) {
	m, err := s.BidiStreamingClient.Recv()
	return m, s.call.ended(err)
}

type restoreStream struct {
	grpc.ServerStreamingClient[proto.RestoreChunk]
	call *call
}

func (s *restoreStream) Recv() (*proto.RestoreChunk, error) {
	m, err := s.ServerStreamingClient.Recv()
	return m, s.call.ended(err)
}

// clientCredentials show this node's certificate and take only the peer's.
type clientCredentials struct{ call *call }

func (c clientCredentials) ClientHandshake(ctx context.Context, authority string, raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	conn, info, err := c.shake(ctx, authority, raw)
	if err != nil {
		c.call.mu.Lock()
		c.call.handshake, c.call.fault = handshakeWords(err), handshakeFault(err)
		c.call.mu.Unlock()
	}
	return conn, info, err
}

func (c clientCredentials) shake(ctx context.Context, authority string, raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	node, err := c.call.identity.load()
	if err != nil {
		return nil, nil, &ownError{err}
	}
	config := tlsConfig(node)
	config.ServerName = c.call.peer
	config.VerifyConnection = func(s tls.ConnectionState) error {
		name, err := certs.NodeName(s.PeerCertificates[0])
		if err == nil && name != c.call.peer {
			err = fmt.Errorf("its certificate is of node '%s', not of '%s'", clip(name), c.call.peer)
		}
		return err
	}
	return credentials.NewTLS(config).ClientHandshake(ctx, authority, raw)
}

func (c clientCredentials) ServerHandshake(net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errNotThisSide
}

func (c clientCredentials) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "tls"}
}
func (c clientCredentials) Clone() credentials.TransportCredentials { return c }
func (c clientCredentials) OverrideServerName(string) error         { return nil }
