// Package proto holds the generated code of blockferry's wire protocol. The
// protocol itself is described in blockferry.proto.
package proto
