# Two nodes in two zones: each has an instance-store SSD, which carries the volume, and an EBS
# disk, which holds a copy of it; the other node has another one. A client reaches the primary
# by an address outside of the VPC's range, to which a route leads.
#
# An example: it was checked as text, and never applied. Read it before you do.

terraform {
  required_version = ">= 1.5"
  required_providers {
    aws = { source = "hashicorp/aws", version = "~> 5.0" }
  }
}

provider "aws" {
  region = var.region
}

variable "region" { type = string }
variable "cluster" {
  description = "names the pair; fencing stops only what is tagged with it"
  type        = string
  default     = "prod"
}
variable "vpc_id" { type = string }
variable "subnet_ids" {
  description = "one in each of two zones"
  type        = list(string)
  validation {
    condition     = length(var.subnet_ids) == 2
    error_message = "Two subnets, in two zones."
  }
}
variable "route_table_ids" {
  description = "those of all subnets that clients are in, and of the nodes' own"
  type        = list(string)
}
variable "address" {
  description = "the floating address, outside of the VPC's range"
  type        = string
  default     = "10.99.0.10"
}
variable "client_cidrs" {
  description = "who may use what the volume's service offers"
  type        = list(string)
}
variable "service_ports" {
  type    = list(number)
  default = [2049]
}
variable "ami" {
  description = "Debian 12 or later, x86_64"
  type        = string
}
variable "instance_type" {
  description = "one with one instance-store disk"
  type        = string
  default     = "m6id.large"
}
variable "ebs_gib" {
  description = "at least as large as the instance-store disk, and room for the journal"
  type        = number
  default     = 150
}
variable "package_url" { type = string }
variable "package_sha256" { type = string }

data "aws_caller_identity" "this" {}

data "aws_subnet" "node" {
  count = 2
  id    = var.subnet_ids[count.index]
}

locals {
  names = ["node-a", "node-b"]
  tags  = { blockferry-cluster = var.cluster }
}

resource "aws_security_group" "node" {
  name_prefix = "blockferry-${var.cluster}-"
  vpc_id      = var.vpc_id
  tags        = local.tags
}

# Replication, between the nodes alone: mutual TLS on top of it.
resource "aws_vpc_security_group_ingress_rule" "replication" {
  security_group_id            = aws_security_group.node.id
  referenced_security_group_id = aws_security_group.node.id
  ip_protocol                  = "tcp"
  from_port                    = 7070
  to_port                      = 7070
}

resource "aws_vpc_security_group_ingress_rule" "service" {
  for_each          = { for pair in setproduct(var.client_cidrs, var.service_ports) : "${pair[0]}-${pair[1]}" => pair }
  security_group_id = aws_security_group.node.id
  cidr_ipv4         = each.value[0]
  ip_protocol       = "tcp"
  from_port         = each.value[1]
  to_port           = each.value[1]
}

# Packages, and the API of EC2. With endpoints in the VPC it may be less.
resource "aws_vpc_security_group_egress_rule" "all" {
  security_group_id = aws_security_group.node.id
  cidr_ipv4         = "0.0.0.0/0"
  ip_protocol       = "-1"
}

resource "aws_iam_role" "node" {
  name_prefix = "blockferry-${var.cluster}-"
  assume_role_policy = jsonencode({
    Version   = "2012-10-17"
    Statement = [{ Effect = "Allow", Action = "sts:AssumeRole", Principal = { Service = "ec2.amazonaws.com" } }]
  })
}

resource "aws_iam_role_policy" "node" {
  role = aws_iam_role.node.id
  policy = templatefile("${path.module}/policy.json.tftpl", {
    region           = var.region
    account          = data.aws_caller_identity.this.account_id
    cluster          = var.cluster
    route_table_arns = [for id in var.route_table_ids : "arn:aws:ec2:${var.region}:${data.aws_caller_identity.this.account_id}:route-table/${id}"]
  })
}

resource "aws_iam_instance_profile" "node" {
  name_prefix = "blockferry-${var.cluster}-"
  role        = aws_iam_role.node.name
}

# What is sent to the floating address is not for the interface's own: no check of that.
resource "aws_network_interface" "node" {
  count             = 2
  subnet_id         = var.subnet_ids[count.index]
  security_groups   = [aws_security_group.node.id]
  source_dest_check = false
  tags              = merge(local.tags, { Name = local.names[count.index] })
}

resource "aws_ebs_volume" "copy" {
  count             = 2
  availability_zone = data.aws_subnet.node[count.index].availability_zone
  size              = var.ebs_gib
  type              = "gp3"
  encrypted         = true
  tags              = merge(local.tags, { Name = "${local.names[count.index]}-copy" })
  lifecycle {
    prevent_destroy = true
  }
}

resource "aws_instance" "node" {
  count                = 2
  ami                  = var.ami
  instance_type        = var.instance_type
  iam_instance_profile = aws_iam_instance_profile.node.name
  # A stop from within is a stop, never the end of the instance.
  instance_initiated_shutdown_behavior = "stop"
  tags                                 = merge(local.tags, { Name = local.names[count.index], blockferry-node = local.names[count.index] })

  network_interface {
    device_index         = 0
    network_interface_id = aws_network_interface.node[count.index].id
  }

  metadata_options {
    http_tokens                 = "required" # IMDSv2
    http_put_response_hop_limit = 1
  }

  root_block_device {
    volume_type = "gp3"
    encrypted   = true
  }

  user_data = templatefile("${path.module}/../user-data.yaml.tftpl", {
    node           = local.names[count.index]
    role           = count.index == 0 ? "primary" : "secondary"
    peer           = local.names[1 - count.index]
    peer_address   = aws_network_interface.node[1 - count.index].private_ip
    cluster        = var.cluster
    address        = var.address
    route_tables   = var.route_table_ids
    ebs            = aws_ebs_volume.copy[count.index].id
    package        = var.package_url
    package_sha256 = var.package_sha256
  })

  lifecycle {
    # A new image or other user-data would replace the node, and with it its SSD.
    ignore_changes = [ami, user_data]
  }
}

resource "aws_volume_attachment" "copy" {
  count       = 2
  device_name = "/dev/sdf"
  volume_id   = aws_ebs_volume.copy[count.index].id
  instance_id = aws_instance.node[count.index].id
}

output "addresses" {
  value = { for i, name in local.names : name => aws_network_interface.node[i].private_ip }
}
