package transport

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"blockferry/cmd/blockferry/certs"
	"blockferry/proto"
	"blockferry/protocol"
)

// What a caller may cost.
const (
	handshakeLimit = 5 * time.Second // from the connection to gRPC's first words
	maxPending     = 32              // connections that have not shown who they are
	maxPendingHost = 8               // of them from one host
	minConnections = 16              // of one node that are allowed in any case
	perVolume      = 6               // and for each volume: a session, a watch, of each one that the node has given up and this side has not; a question where it stands, and one of a restore
	maxStreams     = 4               // calls at once on a connection
	maxHeaderBytes = 8 << 10
	lingerBytes    = 64 << 10 // taken from who was refused, so that the reason arrives
	lingerLimit    = time.Second
)

const nodeHeader = "blockferry-node"

var errNotThisSide = errors.New("these credentials are for the other side")

// ServerOptions say what is served to whom.
type ServerOptions struct {
	Identity *Identity
	Log      *slog.Logger
	Service  proto.ReplicationServer
	// Volumes is how many volumes the callers may come for.
	Volumes int
	// Known reports whether a node has any business here.
	Known func(node string) bool
	// Refused is called for each refusal that is logged; may be nil.
	Refused func(who, why string)
}

// Server serves the replication service, and nothing else, to other nodes.
type Server struct {
	options  ServerOptions
	grpc     *grpc.Server
	limits   limits
	refusals refusals
}

// NewServer makes one that listens nowhere yet.
func NewServer(o ServerOptions) *Server {
	s := &Server{options: o}
	s.limits.refused, s.limits.each = s.refuse, max(minConnections, perVolume*o.Volumes)
	options := append(protocol.ServerOptions(),
		grpc.Creds(serverCredentials{s}), grpc.MaxRecvMsgSize(MaxMessageBytes), grpc.MaxConcurrentStreams(maxStreams),
		grpc.MaxHeaderListSize(maxHeaderBytes), grpc.ConnectionTimeout(handshakeLimit),
		grpc.StreamInterceptor(s.intercept), grpc.UnknownServiceHandler(unknownService))
	s.grpc = grpc.NewServer(options...)
	proto.RegisterReplicationServer(s.grpc, o.Service)
	return s
}

// Serve answers on a listener until Stop; then it returns nil.
func (s *Server) Serve(l net.Listener) error { return s.grpc.Serve(&limitedListener{l, &s.limits}) }

// Stop ends all connections and waits for what they called.
func (s *Server) Stop() { s.grpc.Stop() }

// caller is who a connection is from.
type caller struct {
	credentials.CommonAuthInfo
	node string // by its certificate; "": it showed none, as this is plaintext
	many bool   // its node has more connections than it may
}

func (caller) AuthType() string { return "blockferry" }

// Caller is the node that calls, by its certificate. Without certificates it is
// the name it gives itself.
func Caller(ctx context.Context) string {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return ""
	}
	c, ok := p.AuthInfo.(caller)
	if !ok {
		return ""
	}
	if c.node != "" {
		return c.node
	}
	if names := metadata.ValueFromIncomingContext(ctx, nodeHeader); len(names) == 1 && certs.CheckNodeName(names[0]) == nil {
		return names[0]
	}
	return ""
}

// Who names the caller with its address, for people: NODE@HOST.
func Who(ctx context.Context) string {
	where := "?"
	if p, ok := peer.FromContext(ctx); ok && p.Addr != nil {
		where = hostOf(p.Addr)
	}
	if name := Caller(ctx); name != "" {
		return name + "@" + where
	}
	return where
}

// Refused logs that a caller was refused what it asked for.
func (s *Server) Refused(ctx context.Context, err error) { s.refuse(Who(ctx), err.Error()) }

// refuse logs a refusal, unless the same was logged lately.
func (s *Server) refuse(who, why string) {
	again, log := s.refusals.note(who, why, time.Now())
	if !log {
		return
	}
	args := []any{"from", who, "reason", why}
	if again > 0 {
		args = append(args, "not-logged-since", again)
	}
	s.options.Log.Warn("refused", args...)
	if s.options.Refused != nil {
		s.options.Refused(who, why)
	}
}

// intercept keeps out nodes that have no business here, before a message of theirs is
// read, and logs what can't be understood.
func (s *Server) intercept(server any, stream grpc.ServerStream, _ *grpc.StreamServerInfo, handle grpc.StreamHandler) error {
	ctx := stream.Context()
	if name := Caller(ctx); !s.options.Known(name) {
		why := fmt.Sprintf("node '%s' is not among the 'peers' of any volume here", name)
		if name == "" {
			why = "it does not say which node it is"
		}
		s.refuse(Who(ctx), why)
		return status.Error(codes.PermissionDenied, why)
	}
	if p, ok := peer.FromContext(ctx); ok {
		if c, ok := p.AuthInfo.(caller); ok && c.many {
			why := fmt.Sprintf("it has more than %d connections, as many as %d volumes take", s.limits.each, s.options.Volumes)
			s.refuse(Who(ctx), why)
			return status.Error(codes.ResourceExhausted, why)
		}
	}
	heard := &heardStream{ServerStream: stream}
	err := handle(server, heard)
	// gRPC ends a stream with what it could not read, whatever is said then.
	for _, e := range []error{heard.err(), err} {
		switch status.Code(e) {
		case codes.ResourceExhausted, codes.Internal, codes.InvalidArgument, codes.Unimplemented, codes.DeadlineExceeded, codes.PermissionDenied:
			s.refuse(Who(ctx), clip(status.Convert(e).Message()))
			return err
		}
	}
	return err
}

// heardStream remembers why a message could not be read.
type heardStream struct {
	grpc.ServerStream
	mu     sync.Mutex
	failed error
}

func (h *heardStream) RecvMsg(m any) error {
	err := h.ServerStream.RecvMsg(m)
	if err != nil && !errors.Is(err, io.EOF) {
		h.mu.Lock()
		h.failed = err
		h.mu.Unlock()
	}
	return err
}

func (h *heardStream) err() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.failed
}

func unknownService(_ any, stream grpc.ServerStream) error {
	method, _ := grpc.MethodFromServerStream(stream)
	return status.Errorf(codes.Unimplemented, "only replication is served here, not %s", clip(method))
}

// serverCredentials take only certificates of authorities that are trusted now.
type serverCredentials struct{ server *Server }

func (c serverCredentials) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	conn, who, err := c.shake(raw)
	if err == nil {
		who.many, err = c.server.limits.promote(raw, who.node)
	}
	if err == nil {
		return conn, who, nil
	}
	c.server.refuse(hostOf(raw.RemoteAddr()), handshakeWords(err))
	linger(raw)
	return nil, nil, err
}

func (c serverCredentials) shake(raw net.Conn) (net.Conn, caller, error) {
	var who caller
	identity := c.server.options.Identity
	if identity.Plaintext() {
		who.SecurityLevel = credentials.NoSecurity
		return raw, who, nil
	}
	node, err := identity.load()
	if err != nil {
		return nil, who, err
	}
	// Not gRPC's own, which closes the connection before the reason has left.
	conn := tls.Server(raw, tlsConfig(node))
	if err := conn.Handshake(); err != nil {
		return nil, who, err
	}
	state := conn.ConnectionState()
	if state.NegotiatedProtocol != protocolName {
		return nil, who, errors.New("it does not speak gRPC")
	}
	who.SecurityLevel = credentials.PrivacyAndIntegrity
	who.node, err = certs.NodeName(state.PeerCertificates[0])
	return conn, who, err
}

// linger lets the reason arrive: what was sent and not read would reset the
// connection before.
func linger(raw net.Conn) {
	if c, ok := raw.(*limitedConn); ok {
		if half, ok := c.Conn.(interface{ CloseWrite() error }); ok && half.CloseWrite() == nil {
			_ = raw.SetReadDeadline(time.Now().Add(lingerLimit))
			_, _ = io.CopyN(io.Discard, raw, lingerBytes)
		}
	}
}

func (c serverCredentials) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errNotThisSide
}
func (c serverCredentials) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "tls"}
}
func (c serverCredentials) Clone() credentials.TransportCredentials { return c }
func (c serverCredentials) OverrideServerName(string) error         { return nil }

// hostOf is an address without its port, which is another each time.
func hostOf(a net.Addr) string {
	if a.Network() == "unix" {
		return "this machine"
	}
	if host, _, err := net.SplitHostPort(a.String()); err == nil {
		return host
	}
	return a.String()
}
